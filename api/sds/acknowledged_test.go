package sds

import (
	"fmt"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"
)

// lacking checks how many streams have yet to take a sequence.
func (d *door) lacking(sequence uint64, want int) {
	d.t.Helper()
	synctest.Wait()
	if got, _ := d.server.Acknowledged(sequence); got != want {
		d.t.Fatalf("%d streams lack bundle %d, want %d", got, sequence, want)
	}
}

func TestAcknowledged(t *testing.T) {
	f := fixture()
	withDoor(t, nil, func(t *testing.T, d *door) {
		d.lacking(1, 0) // nobody is connected
		contexts, certs, wild := d.sotw(), d.sotw(), d.delta()
		d.lacking(1, 0) // nobody has asked yet
		contexts.say(ask(NameRootCA))
		certs.say(ask(NameDefault))
		wild.say(subscribe())
		c, w := contexts.next(), wild.next()
		d.lacking(1, 2) // certs asks for no context: it has nothing to take
		contexts.say(ack(c, NameRootCA))
		d.lacking(1, 1)
		wild.say(deltaAck(w))
		d.lacking(1, 0)
		d.lacking(2, 3)

		// The same roots under a later sequence: nothing is sent, nobody has anything to take.
		d.source.Set(secretsOf(t, 2, f.web))
		wild.next() // (other identities and trust domains have gone)
		d.lacking(2, 0)

		// New roots: they count when they are taken, and an SVID's rotation in between does not hide that.
		bundle2, err := newSecretsWith(f.root.Bundle(3, f.other), f.web)
		if err != nil {
			t.Fatal(err)
		}
		_, changed := d.server.Acknowledged(3)
		d.source.Set(bundle2)
		c, w = contexts.next(), wild.next()
		d.lacking(3, 2)
		<-changed
		contexts.say(ack(c, NameRootCA))
		d.lacking(3, 1)
		bundle3, err := newSecretsWith(f.root.Bundle(3, f.other), f.web2)
		if err != nil {
			t.Fatal(err)
		}
		d.source.Set(bundle3)
		later := wild.next()
		d.lacking(3, 1)
		wild.say(deltaAck(w)) // that one had the roots; of the SVID nothing is known yet
		d.lacking(3, 0)
		wild.say(deltaAck(later))
		d.lacking(3, 0)
	})
}

func TestNackIsNoAcknowledgement(t *testing.T) {
	f := fixture()
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameRootCA, NameDefault))
		p.say(nack(p.next(), "", NameRootCA, NameDefault))
		d.lacking(1, 1)
		// A later answer without a context is taken: the context is still refused.
		next, err := newSecretsWith(f.root.Bundle(1), f.web2)
		if err != nil {
			t.Fatal(err)
		}
		d.source.Set(next)
		r := p.next()
		wantNames(t, namesIn(t, r), NameDefault)
		p.say(ack(r, NameRootCA, NameDefault))
		d.lacking(1, 1)
		next, err = newSecretsWith(f.root.Bundle(2, f.other), f.web2)
		if err != nil {
			t.Fatal(err)
		}
		d.source.Set(next)
		p.say(ack(p.next(), NameRootCA, NameDefault))
		d.lacking(2, 0)
	})
}

// Two answers are on their way: the bundle counts when the one that holds it is taken, whatever becomes of the other.
func TestBundleIsTakenAndTheNextAnswerRefused(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p, q := d.sotw(), d.delta()
		p.say(ask(NameRootCA, NameDefault))
		q.say(subscribe(NameRootCA, NameDefault))
		bundle, deltaBundle := p.next(), q.next()
		d.source.Set(fixture().later) // another certificate, the same roots
		cert, deltaCert := p.next(), q.next()
		wantNames(t, namesIn(t, cert), NameDefault)
		wantNames(t, deltaNames(t, deltaCert), NameDefault)
		d.lacking(1, 2)

		q.say(deltaAck(deltaBundle))
		d.lacking(1, 1)
		refused := deltaAck(deltaCert)
		refused.ErrorDetail = nack(cert, "").GetErrorDetail()
		q.say(refused)
		d.lacking(1, 1)

		// State of the world says the version too. One that was not in that answer, as after a NACK, takes nothing.
		stale := ack(bundle, NameRootCA, NameDefault)
		stale.VersionInfo = "another"
		p.say(stale)
		d.lacking(1, 1)
		p.say(ack(bundle, NameRootCA, NameDefault))
		d.lacking(1, 0)
		p.say(nack(cert, bundle.GetVersionInfo(), NameRootCA, NameDefault))
		p.say(ack(bundle, NameRootCA, NameDefault)) // once more: it says nothing new
		d.lacking(1, 0)
		p.quiet()
		if d.acked != 2 || len(d.nacks) != 2 {
			t.Errorf("%d answers taken and %d refused, want two of each", d.acked, len(d.nacks))
		}
	})
}

// Whatever goes out and comes back, in order: the peer has the bundle when it took the last answer with a context, or a
// later one without having refused that.
func TestTakenModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var k taken
		s := &Secrets{sequence: 1}
		const answers = 20
		var context, acked uint64 // the last answer with a context, and the last that was taken
		refused := false
		answered := uint64(0)
		for nonce := uint64(1); nonce <= answers; nonce++ {
			a := answer{nonce: nonce, version: fmt.Sprint("v", nonce), context: rapid.Bool().Draw(t, "context")}
			k.offer(s, &a, false)
			k.sent(&a)
			if a.context {
				context, refused = nonce, false
			}
			for answered < nonce && nonce-answered >= uint64(rapid.IntRange(1, maxPending).Draw(t, "on their way")) {
				answered++
				if k.wasSent(answered, "another") || !k.wasSent(answered, fmt.Sprint("v", answered)) {
					t.Fatalf("the version of answer %d is not known", answered)
				}
				if rapid.Bool().Draw(t, "taken") {
					k.ack(answered)
					acked = answered
				} else {
					k.refuse(answered)
					refused = refused || answered == context
				}
			}
			if _, ok := k.sequence(); ok != (acked >= context && !refused) {
				t.Fatalf("context in %d, taken up to %d, refused %v: got %v", context, acked, refused, ok)
			}
			if len(k.pending) > maxPending {
				t.Fatalf("%d versions are kept", len(k.pending))
			}
		}
	})
}

func TestAcknowledgedWakes(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameRootCA))
		r := p.next()
		woken := make(chan struct{})
		go func() {
			defer close(woken)
			for {
				n, changed := d.server.Acknowledged(1)
				if n == 0 {
					return
				}
				<-changed
			}
		}()
		synctest.Wait()
		select {
		case <-woken:
			t.Fatal("woken before the peer had taken the bundle")
		default:
		}
		p.say(ack(r, NameRootCA))
		<-woken
	})
}

func TestEndedStreamsLackNothing(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameRootCA))
		p.next()
		d.lacking(1, 1)
		_, changed := d.server.Acknowledged(1)
		if err := p.half(); err != nil {
			t.Fatal(err)
		}
		<-changed
		d.lacking(1, 0)
	})
}

func TestWaitingStreamsLackNothing(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		d.source.Set(nil)
		p := d.sotw()
		p.say(ask(NameRootCA))
		d.lacking(1, 0)
		if got := d.one(); !got.Waiting {
			t.Errorf("shown %+v", got)
		}
		d.source.Set(fixture().first)
		r := p.next()
		d.lacking(1, 1)
		p.say(ack(r, NameRootCA))
		d.lacking(1, 0)
		if got := d.one(); got.Waiting || got.Sequence != 1 {
			t.Errorf("shown %+v", got)
		}
	})
}

// Who relies on this hook writes down that the peer has a bundle: so the bundle must not be out before, and a peer that
// came with it must not be left out.
func TestEntrustedIsToldBeforeTheBundleIsSent(t *testing.T) {
	type told struct {
		peer    Stream
		proceed chan struct{}
	}
	hooks := make(chan told, 8)
	adjust := func(c *Config) {
		c.Observe.Entrusted = func(s Stream) {
			h := told{s, make(chan struct{})}
			hooks <- h
			<-h.proceed // nothing goes out before
		}
	}
	withDoor(t, adjust, func(t *testing.T, d *door) {
		next := func() told {
			t.Helper()
			synctest.Wait()
			if len(hooks) != 1 {
				t.Fatalf("told of %d streams, want one", len(hooks))
			}
			return <-hooks
		}
		d.source.Set(nil)
		p, cert := d.sotw(), d.sotw()
		p.say(ask(NameRootCA))
		cert.say(ask(NameDefault))
		synctest.Wait()
		if len(hooks) != 0 {
			t.Fatal("told of somebody who has nothing")
		}
		d.source.Set(fixture().first)
		cert.say(ack(cert.next(), NameDefault)) // a certificate entrusts nobody
		p.quiet()
		h := next()
		if !h.peer.Entrusted || h.peer.Waiting {
			t.Errorf("told of %+v", h.peer)
		}
		d.lacking(1, 1) // as soon as it is told, it is waited for
		close(h.proceed)
		r := p.next()
		p.say(ack(r, NameRootCA))
		d.lacking(1, 0)
		bundle2, err := newSecretsWith(fixture().root.Bundle(2, fixture().other), fixture().web)
		if err != nil {
			t.Fatal(err)
		}
		d.source.Set(bundle2)
		r = p.next()
		if len(hooks) != 0 {
			t.Error("told twice")
		}

		// A peer that comes back with what it has is sent nothing, and holds it all the same.
		again := d.sotw()
		first := ask(NameRootCA)
		first.VersionInfo = r.GetVersionInfo()
		again.say(first)
		again.quiet()
		h = next()
		close(h.proceed)
		again.quiet()
		d.lacking(2, 1) // p alone, which has not said yet that it took it
	})
}
