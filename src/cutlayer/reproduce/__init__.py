"""The paper's tables, reproduced: cells, training, outcomes, tables, claims, plots, pages."""
