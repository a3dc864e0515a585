"""Where clients run. `local` is the reference; every other engine is proved equal to it."""
