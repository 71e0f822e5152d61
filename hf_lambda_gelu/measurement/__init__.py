"""What a model does on data; changes nothing. May import `structure` and what is below."""
