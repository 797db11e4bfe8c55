"""Multiple-choice scores and perplexity."""
