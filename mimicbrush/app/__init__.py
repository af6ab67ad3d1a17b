"""Pages in the browser: the mask painter and the editing page.

In reading order:

* `mask_painter`: paints masks over images; a server for this machine alone.
* `editing_service`: what the editing page does, without HTTP.
* `edit_queue`: one edit after the other, and who hears of it; `previews` shows how far it is.
* `session_files`: keeps what visitors of the editing page upload and get.
* `image_reader`: reads what they upload, in processes of its own.
* `access`: who may open the editing page.
* `gate`: the door that every request passes; `bodies` reads what requests bring.
* `page_routes`: the editing page's addresses.
* `page_server`: serves it, and ends soon.
* `examples`: images to begin with on the editing page.
* `static/`: the HTML, CSS and JavaScript of both pages, as the browser gets them.
"""
