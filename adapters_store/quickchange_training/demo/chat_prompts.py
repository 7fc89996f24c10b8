"""General chat prompts, made from templates: common questions to a small assistant.

The demo's heads for the plain base model learn from its own answers to them.
"""

from __future__ import annotations

import random
from itertools import product

_TOPICS = (
    "photosynthesis", "the water cycle", "gravity", "volcanoes", "the solar system", "vaccines",
    "electric cars", "solar panels", "climate change", "recycling", "black holes", "dinosaurs",
    "the Roman Empire", "the printing press", "the French Revolution", "ancient Egypt",
    "the Silk Road", "the Industrial Revolution", "democracy", "inflation", "interest rates",
    "supply and demand", "machine learning", "neural networks", "databases", "the internet",
    "computer viruses", "cloud computing", "open source software", "unit testing", "recursion",
    "sorting algorithms", "version control", "healthy sleep", "balanced diets", "running",
    "yoga", "meditation", "stress at work", "time management", "public speaking", "job interviews",
    "learning a language", "playing the guitar", "painting", "photography", "gardening",
    "baking bread", "coffee", "tea", "chess", "basketball", "hiking", "camping", "cycling",
    "beekeeping", "whales", "penguins", "honey bees", "rain forests", "coral reefs", "deserts",
    "the Moon", "Mars", "rockets", "satellites", "bridges", "trains", "airplanes", "libraries",
    "museums", "poetry", "novels", "jazz", "classical music", "movies", "friendship", "honesty",
    "teamwork", "leadership", "saving money", "budgets", "small businesses", "marketing",
    "remote work", "renewable energy", "water shortages", "earthquakes", "the human heart",
    "the brain", "antibiotics", "DNA", "evolution", "atoms", "magnets", "light", "sound",
)  # fmt: skip
_QUESTIONS = (
    "What is the most important thing to know about {}?",
    "Explain {} to a ten-year-old.",
    "Explain {} in simple terms.",
    "Why does {} matter?",
    "Give me five facts about {}.",
    "List three advantages and three disadvantages of {}.",
    "Write a short paragraph about {}.",
    "Write a poem about {}.",
    "Write a short story about {}.",
    "Tell me about {}.",
    "What are common misconceptions about {}?",
    "How has {} changed over the last hundred years?",
    "Give me tips for someone who is new to {}.",
    "Summarize the history of {} in a few sentences.",
    "What should a beginner learn first about {}?",
    "Write an introduction for an essay on {}.",
    "Write a blog post title and opening about {}.",
    "Make a quiz question about {} and answer it.",
    "Compare {} with something similar.",
    "How would you teach a class about {}?",
    "Write an e-mail to a friend about {}.",
    "What questions do people often ask about {}?",
    "Describe {} in one sentence.",
    "Why do people like {}?",
    "Write a dialogue between two people who talk about {}.",
)


def chat_prompts(count: int, seed: int) -> list[str]:
    """`count` different user messages. Raises ValueError for more than there are."""
    every = [question.format(topic) for question, topic in product(_QUESTIONS, _TOPICS)]
    if count > len(every):
        raise ValueError(f"{count} chat prompts asked for; there are {len(every)}")
    return random.Random(f"chat/{seed}").sample(every, count)
