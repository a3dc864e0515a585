"""What training costs: bytes, computation, time, energy; counted, measured or modelled."""
