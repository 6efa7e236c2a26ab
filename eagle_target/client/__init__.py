"""The client: a trainer's rows out, batches back, over any number of servers."""
