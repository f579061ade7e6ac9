"""Programs that Playwright can drive, by the names under which systems install them."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
