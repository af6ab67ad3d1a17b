"""Pages in the browser: the mask painter and the editing page.

In reading order:

* `mask_painter`: paints masks over images; a server for this machine alone.
* `editing_service`: what the editing page does, without gradio and HTTP.
* `session_files`: keeps what visitors of the editing page upload and get.
* `image_reader`: reads what they upload, in processes of its own.
* `access`: who may open the editing page.
* `gate`: the door that every request passes; `bodies` reads what requests bring.
* `page_routes`: the editing page's own addresses.
* `editing_page`: the editing page, with gradio's controls.
* `page_server`: serves it, and ends soon.
* `examples`: images to begin with on the editing page.
* `static/`: the HTML, CSS and JavaScript of both pages.
"""
