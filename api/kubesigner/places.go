package kubesigner

import (
	"context"
	"time"
)

const (
	// maxPending bounds the names of open requests that are kept. Beyond it they are left to a later list.
	maxPending = 10_000
	// maxPerOwner bounds those of one owner: kubelet makes one a volume, and a pod may have as many as fit into it.
	maxPerOwner = 64
	// relistEvery is how often at most all is listed for what owners had no place for: a list is of all open requests.
	relistEvery = 15 * time.Second
)

// owner is whose open requests are kept: a pod, or whoever is known in its place.
type owner struct {
	places int
	// waiter is the one request that waits for its pod to be issued more (POD_LIMIT). The others would hear the same: until it
	// is through they have no place, and no try.
	waiter *item
	missed bool // some were seen and not kept
}

// seen puts an open request into the queue.
func (d *door) seen(obj any) {
	o, ok := obj.(object)
	if !ok || !d.open(o) {
		return
	}
	key, uid, whose := objectKey{o.GetNamespace(), o.GetName()}, string(o.GetUID()), d.owner(o)
	d.mu.Lock()
	defer d.mu.Unlock()
	own := d.owners[whose]
	switch it := d.items[key]; {
	case it != nil && it.seen == uid: // it has its turn, and is read anew then
	case it != nil: // another one of that name: what the one before waits for is none of its business
		d.leave(it)
		d.enter(it, whose)
		it.seen, it.again = uid, true
		d.queue.Add(key)
	case own != nil && (own.waiter != nil || own.places >= maxPerOwner):
		own.missed = true
	case len(d.items) >= maxPending:
		d.missed = true
	default:
		it := &item{seen: uid}
		d.items[key] = it
		d.enter(it, whose)
		d.queue.Add(key)
	}
}

// enter gives a request a place of its owner's. d.mu is held.
func (d *door) enter(it *item, whose string) {
	own := d.owners[whose]
	if own == nil {
		own = &owner{}
		d.owners[whose] = own
	}
	own.places++
	it.owner = whose
}

// leave takes the place back. d.mu is held.
func (d *door) leave(it *item) {
	own := d.owners[it.owner]
	own.places--
	if own.waiter == it {
		own.waiter = nil
	}
	d.relieved(own)
	if own.places == 0 {
		delete(d.owners, it.owner)
	}
}

// relieved has what an owner had no place for listed again, once there is room for it. d.mu is held.
func (d *door) relieved(own *owner) {
	if own.missed && own.waiter == nil && own.places <= maxPerOwner/2 {
		own.missed, d.wanted = false, true
	}
}

// up takes a name up for a try. nil: there is none to make, for it is done, or others of its owner wait.
func (d *door) up(key objectKey) *item {
	d.mu.Lock()
	defer d.mu.Unlock()
	it := d.items[key]
	if it == nil { // the queue was told twice, and the first time was enough
		return nil
	}
	if own := d.owners[it.owner]; own.waiter != nil && own.waiter != it && it.made == nil {
		d.letGo(key, it)
		return nil
	}
	it.again = false // whatever was seen so far is read now
	return it
}

// limited is told whether a try that failed met its pod's limit. It reports whether that is to be tried again: of one pod's
// requests one alone is.
func (d *door) limited(key objectKey, it *item, podLimit bool) (again bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	own := d.owners[it.owner]
	switch {
	case it.again: // another one of that name
	case !podLimit && own.waiter == it:
		own.waiter = nil
		d.relieved(own)
	case podLimit && own.waiter != nil && own.waiter != it:
		d.letGo(key, it)
		return false
	case podLimit:
		own.waiter = it
	}
	return true
}

// letGo leaves a request to a later list. d.mu is held.
func (d *door) letGo(key objectKey, it *item) {
	d.owners[it.owner].missed = true
	delete(d.items, key)
	d.leave(it)
	d.roomier()
}

// done forgets a request.
func (d *door) done(key objectKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	it := d.items[key]
	if it.again {
		it.again = false
		d.queue.Add(key)
		return
	}
	delete(d.items, key)
	d.leave(it)
	d.roomier()
}

// roomier has those that had no place beside the others listed again, once there is room. d.mu is held.
func (d *door) roomier() {
	if d.relist != nil && d.missed && len(d.items) < maxPending/2 {
		d.missed = false
		d.relist()
	}
}

// relistWanted ends a round where owners have room again for what they had none for.
func (d *door) relistWanted(round context.Context, stop func()) {
	look := time.NewTicker(d.relistEvery)
	defer look.Stop()
	for {
		select {
		case <-round.Done():
			return
		case <-look.C:
		}
		d.mu.Lock()
		wanted := d.wanted && len(d.items) < maxPending/2
		d.mu.Unlock()
		if wanted {
			stop()
		}
	}
}
