"""How what people see is called and coloured, the same in every figure, table and page."""
