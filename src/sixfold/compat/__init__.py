"""Names, call shapes and files of earlier projects, translated into Sixfold's own."""
