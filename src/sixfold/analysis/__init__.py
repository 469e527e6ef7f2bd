"""What the attention heads of a model do over a data loader; above report and integrations."""
