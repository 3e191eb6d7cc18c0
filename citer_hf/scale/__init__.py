"""What runs on engines and machines other than this process: a remote LLM, replicas, workers."""
