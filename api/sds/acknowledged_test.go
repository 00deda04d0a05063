package sds

import (
	"testing"
	"testing/synctest"
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
		wild.say(deltaAck(w))
		d.lacking(3, 1) // of the last answer nothing is known yet
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
