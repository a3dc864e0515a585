"""The paper's tables, trained anew: cells, training, outcomes, tables, claims, plots, pages."""
