"""Questions about ``torch.fx`` graphs and passes over them that every capture route shares."""
