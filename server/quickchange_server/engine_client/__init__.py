"""The API process's side of the pipe: one supervised engine and the requests in flight with it."""
