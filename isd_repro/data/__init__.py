"""Images: where they come from, which are drawn, how they are packed and read, and how views are made of them."""
