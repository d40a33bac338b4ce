"""Operations on `torch.fx` graphs that every capture route shares."""
