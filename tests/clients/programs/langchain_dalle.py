"""LangChain's DallEAPIWrapper, which asks for dall-e-2, 1024x1024 and URLs."""

from calls import BASE, check, check_png, fetched, run
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper


def url():
    wrapper = DallEAPIWrapper(base_url=BASE, api_key="none needed")
    return check_png(fetched(wrapper.run("a red ball")))


def several():
    wrapper = DallEAPIWrapper(base_url=BASE, api_key="none needed", model="dall-e-3", n=2)
    urls = wrapper.run("a red ball").split()
    check(len(urls) == 2, urls)


run(url=url, several=several)
