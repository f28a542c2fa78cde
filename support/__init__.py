"""What the lesson needs but does not teach: read it last, or never."""
