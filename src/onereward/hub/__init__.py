"""Publishing and loading: adapters in both LoRA formats, cards, and the import hook."""
