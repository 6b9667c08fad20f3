"""Updates of the weights: rules, rates, number formats."""
