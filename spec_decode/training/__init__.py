"""How a drafter is trained: the target writes its own texts, a Gemma 4 assistant learns to guess them."""
