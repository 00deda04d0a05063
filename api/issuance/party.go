package issuance

import (
	"context"
	"errors"

	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/ca/registration"
)

// party is who is at the other end of a connection. It is made once, at the handshake, so that calls pay nothing for it,
// and holds for as long as the connection does.
type party struct {
	registration.Caller
	// agent: its SVID is that of an agent as the CA knows it. Everybody else is a stranger, whatever SVID he shows: any pod can
	// have one.
	agent bool
	// account is whose account its calls are on: an agent has its own, strangers have that of their address.
	account string
	// network is a stranger's IPv6 /64; empty for all others.
	network string
	// name is who is refused, where refusals are counted: the ID that was proved, whosever that is, or else the address.
	name string
}

func newParty(c registration.Caller, agent bool) *party {
	host := inbound.Host(c.Address)
	p := &party{Caller: c, agent: agent, account: host, name: host}
	if !c.ID.IsZero() {
		p.name = c.ID.String()
	}
	if agent {
		p.account = p.name
	} else if n := inbound.Network(c.Address); n != host {
		p.network = n
	}
	return p
}

// callerOf returns who is at the other end of a call's connection.
func callerOf(ctx context.Context) (*party, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("issuance: the call has no peer")
	}
	info, ok := p.AuthInfo.(callerInfo)
	if !ok || info.party == nil {
		return nil, errors.New("issuance: the connection was not made with issuance.Credentials")
	}
	return info.party, nil
}

// hangUp closes the connection of a call, and with it ends all that came through it.
func hangUp(ctx context.Context) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(callerInfo); ok {
			_ = info.raw.Close()
		}
	}
}
