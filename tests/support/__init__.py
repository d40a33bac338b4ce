"""What tests share: models, cases, drivers of servers and networks."""
