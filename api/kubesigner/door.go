package kubesigner

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/util/workqueue"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

// workers are the requests of one kind that are in hand at once.
const workers = 8

// The states of a door.
const (
	StateStarting  = "starting"
	StateServing   = "serving"
	StateNotServed = "not served"
	StateForbidden = "forbidden"
	StateFailing   = "failing"
)

// DoorStatus is how a kind of request is served.
type DoorStatus struct {
	// API is the resource's plural name, Version the one that is spoken; empty where none is served.
	API, Version string
	// State is one of the states above; Why says more where it is neither starting nor serving.
	State, Why string
	// Pending are open requests that are kept. What a pod has beyond its limits is not among them.
	Pending int
}

// door serves one kind of request of one cluster.
type door struct {
	protocol
	o     SignerOptions
	api   *api
	by    *registration.Admitted
	queue workqueue.TypedDelayingInterface[objectKey]
	tell  func(outcome string)

	resource atomic.Pointer[resource] // nil while it is not served

	mu       sync.Mutex
	items    map[objectKey]*item // open requests: in the queue, waiting for it, or in hand
	owners   map[string]*owner   // of items
	missed   bool                // some were seen and not kept
	wanted   bool                // owners have room again for what they had none for
	relist   func()              // ends the round that follows; nil between rounds
	state    string
	why      string
	askAgain bool // a write was refused: look at the rights

	relistEvery time.Duration
}

// item is what is remembered of an open request between two tries.
type item struct {
	// seen is the UID of the object that was seen last; again, that another one of that name was seen since a worker took
	// the name up. They are guarded by the door's mu.
	seen  string
	again bool
	owner string // so is this: a key of the door's owners

	// The rest is for the worker that has the name in hand.
	failures int
	uid      string
	made     *made // signed, not yet delivered
	// claimedBy is another replica's claim, as it was since.
	claimedBy string
	since     time.Time
}

func newDoor(o SignerOptions, a *api, p protocol, by *registration.Admitted, tell func(string)) *door {
	return &door{
		relistEvery: relistEvery,
		protocol:    p, o: o, api: a, by: by, tell: tell, items: map[objectKey]*item{}, owners: map[string]*owner{}, state: StateStarting,
		queue: workqueue.NewTypedDelayingQueue[objectKey](),
	}
}

// run serves until ctx ends, and returns when what was in hand is done.
func (d *door) run(ctx context.Context) {
	var working sync.WaitGroup
	for range workers {
		working.Go(func() { d.work(ctx) })
	}
	for ctx.Err() == nil {
		wait := d.o.Every
		if r, err := d.look(ctx); err == nil {
			wait = time.Second
			d.follow(ctx, r)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	d.queue.ShutDown()
	working.Wait()
}

// look finds out whether the API is served, in which version, and whether we may do what answering takes. While one of
// them is not so, nothing is answered: least of all is anything signed that could not be delivered.
func (d *door) look(ctx context.Context) (resource, error) {
	r, found, err := d.api.served(ctx, d.plural, d.versions...)
	switch {
	case ctx.Err() != nil:
		return resource{}, ctx.Err()
	case err != nil:
		return resource{}, d.turn(StateFailing, err)
	case !found:
		return resource{}, d.turn(StateNotServed, fmt.Errorf("the cluster serves no %s in %s", d.plural, strings.Join(d.versions, " or ")))
	}
	for _, need := range d.rights {
		may, err := d.api.may(ctx, need)
		if err == nil && !may && need.resource == "signers" { // a role may name all signers of the domain
			domain, _, _ := strings.Cut(need.name, "/")
			may, err = d.api.may(ctx, right{need.verb, need.resource, "", domain + "/*"})
		}
		switch {
		case ctx.Err() != nil:
			return resource{}, ctx.Err()
		case err != nil:
			return resource{}, d.turn(StateFailing, err)
		case !may:
			return resource{}, d.turn(StateForbidden, fmt.Errorf("the CA's account may not %s: give it the rights of docs/examples/kubernetes-signers-rights.yaml", need))
		}
	}
	d.resource.Store(&r)
	return r, nil
}

// turn notes a state, logs it if it is another than before, and returns why.
func (d *door) turn(state string, why error) error {
	if state != StateServing {
		d.resource.Store(nil)
	}
	text := ""
	if why != nil {
		text = refusal.Clip(why.Error(), 512)
	}
	d.mu.Lock()
	turned := d.state != state
	d.state, d.why = state, text
	d.mu.Unlock()
	if !turned {
		return why
	}
	log := d.o.Log.With("api", d.plural)
	switch state {
	case StateServing:
		log.Info("requests are answered", "version", d.resource.Load().Version, "signer", d.o.Config.Name)
	case StateNotServed:
		log.Warn("requests are not answered: the cluster does not serve their API; it is looked for again", "why", text)
	default:
		log.Warn("requests are not answered", "state", state, "why", text)
	}
	return why
}

// follow has open requests come to the queue until that has to be looked at anew.
func (d *door) follow(ctx context.Context, r resource) {
	round, stop := context.WithCancel(ctx)
	defer stop()
	d.mu.Lock()
	d.relist, d.missed, d.wanted, d.askAgain = stop, false, false, false
	d.mu.Unlock()
	go d.relistWanted(round, stop)
	f := following{
		api: d.api, resource: r, selector: fields.OneTermEqualSelector("spec.signerName", d.o.Config.Name), example: d.empty(),
		seen: d.seen, strip: func(obj any) {
			if o, ok := obj.(object); ok { // else a tombstone
				d.strip(o)
			}
		},
		heard: func(err error) {
			if err == nil {
				_ = d.turn(StateServing, nil)
			} else {
				_ = d.turn(StateFailing, err)
				d.resource.Store(&r) // a watch that breaks keeps nobody from an answer
			}
		},
	}
	_ = f.run(round) // why it ended is what the next look finds
}

// refused is told that the API server did not let an answer be written.
func (d *door) refused() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.relist != nil && !d.askAgain {
		d.askAgain = true
		d.relist()
	}
}

// status is how the door is.
func (d *door) status() DoorStatus {
	s := DoorStatus{API: d.plural}
	if r := d.resource.Load(); r != nil {
		s.Version = r.Version
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.State, s.Why, s.Pending = d.state, d.why, len(d.items)
	return s
}
