"""The only room that imports MindSpore or MindFormers: loading, networks, and what the other rooms need of them."""
