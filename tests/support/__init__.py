"""What several tests share: tiny models, stock transformers in another process, the Hub on loopback, references."""
