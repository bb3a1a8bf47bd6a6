"""From committed records to tables, figures and a page: every printed number is computed here, none is typed."""
