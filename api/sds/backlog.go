package sds

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// backlog counts the answers that grpc has taken and not yet written, because a peer does not read: a call that its peer has
// ended is over for grpc when its handler has returned, whatever is still to be written for it. Each account has
// Limits.AnswerBacklog of that for itself, and what is beyond it is of Limits.SpareAnswerBacklog, which all share. The zero
// backlog is empty.
type backlog struct {
	mu    sync.Mutex
	by    map[string]*owing
	spare int
	// fewer is set when something was written that somebody waits for.
	fewer   rotation.Current[struct{}]
	waiting int
}

// owing is what is not yet written for one account.
type owing struct {
	bytes int
	// calls are those whose end is not yet written, whether they are over for grpc or not.
	calls int
}

func (o owing) over(own int) int { return max(0, o.bytes-own) }

// line is one connection. backlog.mu guards what changes.
type line struct {
	server  *Server
	conn    *endsOf
	who     string // as Observe has it
	account Account

	bytes, calls int
	stalled      *time.Timer // runs while there are bytes; nil before the first
}

// lineInfo are the credentials of a connection that is a line.
type lineInfo struct {
	credentials.AuthInfo
	*line
}

// lineOf is the connection of a call; nil where it did not come by ServerOptions.
func lineOf(ctx context.Context) *line {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, _ := p.AuthInfo.(lineInfo)
	return info.line
}

// rules are what the connection is held to as it is read and written.
func (l *line) rules() inbound.Rules {
	limits := &l.server.config.Limits
	return inbound.Rules{
		Patience: limits.FirstRequest, Unread: maxUnread, WritePatience: limits.Send,
		Large: l.server.large, Above: limits.RequestBytes, Whose: l.account.Name,
		Broken: func(err error) { l.server.config.Observe.refused(l.who, err) },
		Opened: l.opened, Ended: l.ended, Wrote: l.wrote,
	}
}

// change lets fn change what the connection and its account owe, and keeps what is counted with that.
func (l *line) change(fn func(*owing)) {
	b, own := &l.server.backlog, l.server.config.Limits.AnswerBacklog
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.by[l.account.Name]
	if o == nil {
		if b.by == nil {
			b.by = map[string]*owing{}
		}
		o = &owing{}
		b.by[l.account.Name] = o
	}
	before := *o
	b.spare -= o.over(own)
	fn(o)
	b.spare += o.over(own)
	if *o == (owing{}) {
		delete(b.by, l.account.Name)
	}
	if b.waiting > 0 && o.bytes < before.bytes {
		b.fewer.Set(struct{}{})
	}
}

// owe counts an answer that is about to be sent, if there is room for it. Where nothing is owed there is, however large it is.
func (l *line) owe(bytes int) (ok bool) {
	limits := &l.server.config.Limits
	l.change(func(o *owing) {
		others := l.server.backlog.spare // this account's part is taken out
		after := owing{bytes: o.bytes + bytes}.over(limits.AnswerBacklog)
		if ok = after == 0 || others+after <= limits.SpareAnswerBacklog || others == 0 && o.bytes == 0; !ok {
			return
		}
		if o.bytes += bytes; l.bytes == 0 {
			l.watch()
		}
		l.bytes += bytes
	})
	return ok
}

// await counts an answer when there is room for it, or returns why there is none in time.
func (l *line) await(ctx context.Context, bytes int) error {
	b := &l.server.backlog
	b.mu.Lock()
	b.waiting++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.waiting--
		b.mu.Unlock()
	}()
	for {
		_, fewer := b.fewer.Get()
		if l.owe(bytes) {
			return nil
		}
		select {
		case <-fewer:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unsent takes back what was counted for an answer that was not sent after all.
func (l *line) unsent(bytes int) { l.change(func(o *owing) { l.less(o, bytes) }) }

// wrote is told of the content that is being written.
func (l *line) wrote(n int) {
	l.change(func(o *owing) {
		if l.less(o, n); l.bytes > 0 {
			l.watch()
		}
	})
}

// less takes off what was written, and backlog.mu is held.
func (l *line) less(o *owing, n int) {
	n = min(n, l.bytes)
	l.bytes, o.bytes = l.bytes-n, o.bytes-n
	if l.bytes == 0 && l.stalled != nil {
		l.stalled.Stop()
	}
}

// watch gives the peer time to read on, and backlog.mu is held. A stream ends after Send; what is left of it can be got rid of
// by its peer, who resets it, or with the connection.
func (l *line) watch() {
	d := 2 * l.server.config.Limits.Send
	if l.stalled == nil {
		l.stalled = time.AfterFunc(d, l.stall)
		return
	}
	l.stalled.Reset(d)
}

// stall closes the connection, unless it has no calls any more: then what is counted was taken by grpc when it ended, and is gone.
func (l *line) stall() {
	var calls int
	if l.change(func(o *owing) {
		if calls = l.calls; calls == 0 {
			l.less(o, l.bytes)
		}
	}); calls == 0 {
		return
	}
	limits := &l.server.config.Limits
	l.server.config.Observe.refused(l.who, refusal.New(refusal.PeerLimit,
		"the peer reads none of its answers, twice %s long (limit: %s); its connection is closed", limits.Send, limits.called("Send")))
	_ = l.conn.Close()
}

// opened counts a call, and reports whether there is room for it: each that is open, and as many as a connection may carry
// whose end the peer has not let be written yet.
func (l *line) opened() (ok bool) {
	l.change(func(o *owing) {
		l.calls++
		o.calls++
		ok = o.calls <= l.account.Streams+int(l.server.config.Limits.StreamsPerConnection)
	})
	return ok
}

// ended is told of calls whose end is written, or of all when the connection is closed.
func (l *line) ended(n int) {
	l.change(func(o *owing) {
		l.calls -= n
		o.calls -= n
		if l.calls == 0 { // what was to be written for a call that the peer reset is not
			l.less(o, l.bytes)
		}
	})
}
