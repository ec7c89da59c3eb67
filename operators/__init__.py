"""What is measured on a clip. An operator measures and never decides."""
