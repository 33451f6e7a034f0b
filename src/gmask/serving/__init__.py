"""How do programs and people reach a model: by HTTP, on one machine or many?"""
