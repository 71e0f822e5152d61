"""The verbs that change a model in place: convert, relu_ize, fold. May import `measurement` and what is below."""
