"""What a run costs: bytes."""
