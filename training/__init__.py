"""Text-only contrastive LoRA of E5-V with the sentence-transformers trainer."""
