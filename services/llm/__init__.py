"""The language model stage: conversation to text and semantic tokens."""
