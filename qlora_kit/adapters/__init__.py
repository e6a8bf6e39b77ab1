"""What is trained on top of the frozen base: protocol, methods, PEFT's file format."""
