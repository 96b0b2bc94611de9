"""How a step is computed over ranks: DeepSpeed, and the layers divided by columns."""
