"""What runs on other engines and machines: a remote LLM, replicas and workers on Ray."""
