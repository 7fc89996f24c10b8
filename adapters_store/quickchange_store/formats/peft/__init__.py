"""PEFT directories: LoRA, DoRA and IA3."""
