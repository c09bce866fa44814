"""A local page to read trajectories, label their steps by hand and hold labels against each other.

    trajectories -> catalogue   what there is, as columns; one trajectory at a time
    labels       -> columns     who said what of which step, as columns
    gold file   <-> session     what one annotator may see and says
                    app, guard  requests; who may make them
                    static/     the page: HTML, CSS and JavaScript as written, no build

The server hides, the page only shows: in a blind session, what others said of a step leaves the
process when this annotator has said something of it, not before.
"""
