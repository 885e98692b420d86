"""What a program around mmengine's runner needs."""
