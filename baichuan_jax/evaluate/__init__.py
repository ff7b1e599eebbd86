"""Multiple-choice tests (MMLU, C-Eval, AGIEval, Gaokao) and perplexity by context length."""
