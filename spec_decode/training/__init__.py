"""Training a drafter: the target generates the texts, and a Gemma 4 assistant is trained to predict them."""
