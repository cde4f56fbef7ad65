"""Second moments of the inputs of experts, for merges and starts without data."""

# Of the moments, the share of the positions that predict an answer's tokens. What an expert does there is what its loss
# reads; but most tokens of a prompt are its image's, alike for all experts: by number, they make every merge a mean.
ANSWER_SHARE = 0.95
