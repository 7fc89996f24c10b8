"""LoRA training with PEFT."""
