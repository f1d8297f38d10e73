"""What training needs: recipes, losses, data, and backbones for small images."""
