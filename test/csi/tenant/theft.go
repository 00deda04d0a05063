package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// loot is what lies on a node, and what pods of another node have.
type loot struct {
	// agent is the SVID of the node's agent, and agentToken what that got it by; podToken is the token of a pod beside it.
	agent                tls.Certificate
	agentToken, podToken string
	// otherAgentToken and otherToken are those of an agent and of a pod on the other node; neighbour is the pod beside the agent.
	otherAgentToken, otherToken string
	neighbour                   *meshcav1.PodReference
}

// readLoot reads it from a folder, the SVID as the agent keeps it.
func readLoot(folder string) (l loot, err error) {
	var kept struct {
		Chain [][]byte `json:"chain"`
		Key   []byte   `json:"key"`
	}
	var neighbour struct{ Namespace, Name, UID string }
	for file, to := range map[string]any{
		"agent.json": &kept, "neighbour.json": &neighbour, "agent-token": &l.agentToken, "pod-token": &l.podToken,
		"other-agent-token": &l.otherAgentToken, "other-token": &l.otherToken,
	} {
		text, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			return l, err
		}
		if token, ok := to.(*string); ok {
			*token = string(text)
		} else if err := json.Unmarshal(text, to); err != nil {
			return l, fmt.Errorf("%s: %w", file, err)
		}
	}
	l.neighbour = &meshcav1.PodReference{Namespace: neighbour.Namespace, Name: neighbour.Name, Uid: neighbour.UID}
	l.agent.Certificate = kept.Chain
	l.agent.PrivateKey, err = x509.ParsePKCS8PrivateKey(kept.Key)
	return l, err
}

func (in installation) with(token string) installation {
	in.token = token
	return in
}

// thief shows the CA what was stolen, from a pod that has nothing to do with it. How each try ended is printed: the ones that
// should be granted too, which show that the others were refused for nothing else than what is said of them.
func thief(ctx context.Context, p *printer, in installation, folder string) error {
	l, err := readLoot(folder)
	if err != nil {
		return err
	}
	door := net.JoinHostPort(in.ca, "8443")
	try := func(what string, shows tls.Certificate, do func(context.Context, meshcav1.IssuanceServiceClient) error) {
		var svids []tls.Certificate
		if len(shows.Certificate) > 0 {
			svids = append(svids, shows)
		}
		p.say(Line{What: "tried", Text: what + ": " + call(ctx, door, svids, do)})
	}
	become := func(what, token string) (svid tls.Certificate) {
		try(what, tls.Certificate{}, func(ctx context.Context, c meshcav1.IssuanceServiceClient) (err error) {
			svid, err = in.with(token).become(ctx, c)
			return err
		})
		return svid
	}
	attested, other := become("an SVID for the agent's token", l.agentToken), become("an SVID for the other agent's token", l.otherAgentToken)
	try("the agent's SVID, with the token of a pod on the other node", l.agent, in.with(l.otherToken).issue)
	try("an SVID got by the agent's token, with the token of a pod on the other node", attested, in.with(l.otherToken).issue)
	try("the other agent's SVID, with the token of a pod beside the first", other, in.with(l.podToken).issue)
	try("the agent's SVID, with its own token", l.agent, in.with(l.agentToken).issue)
	try("the agent's SVID, naming a pod beside it", l.agent, func(ctx context.Context, c meshcav1.IssuanceServiceClient) error {
		return in.request(ctx, c, &meshcav1.X509SVIDRequest{Pod: l.neighbour})
	})
	try("the agent's SVID, with the token of a pod beside it", l.agent, in.with(l.podToken).issue)
	p.say(Line{What: "done"})
	return nil
}
