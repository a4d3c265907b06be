"""Text files into documents, shards into batches."""
