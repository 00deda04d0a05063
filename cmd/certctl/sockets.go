package main

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/api/admin/client"
)

// openCA connects to the CA's socket.
func (c *cli) openCA(ctx context.Context) (*client.Conn, error) {
	conn, err := client.Open(ctx, c.socket)
	if err == nil {
		return conn, nil
	}
	f := theCA.unreachable(err)
	if !c.socketSet && !exists(c.socket) && exists(c.agent) {
		f.next = "This machine has an agent: add --agent to ask it, or run certctl where the CA is"
	}
	return nil, f
}

// openAgent connects to the agent's socket.
func (c *cli) openAgent(ctx context.Context) (*client.Conn, error) {
	conn, err := client.Open(ctx, c.agent)
	if err != nil {
		return nil, theAgent.unreachable(err)
	}
	return conn, nil
}

// asked is which of the two a verb that knows both is to ask: what the flags name, or what is on this machine.
func (c *cli) asked() (ca, agent bool, err error) {
	if c.socketSet || c.agentSet {
		return c.socketSet, c.agentSet, nil
	}
	ca, agent = exists(c.socket), exists(c.agent)
	if !ca && !agent {
		return false, false, &failure{
			code: exitUnreachable, what: "there is nothing to ask on this machine", why: "neither " + c.socket + " nor " + c.agent + " is there",
			next: "Start meshca or meshca-agent, or name a socket with --socket=PATH or --agent=PATH",
		}
	}
	return ca, agent, nil
}

// one is for verbs that ask either the CA or, with --agent, the agent.
func (c *cli) one() (agent bool, err error) {
	if c.socketSet && c.agentSet {
		return false, usage("--socket and --agent together: this verb asks one of them")
	}
	return c.agentSet, nil
}

// caOnly refuses --agent where only the CA knows.
func (c *cli) caOnly(cmd *cobra.Command) error {
	if c.agentSet {
		return usage("`%s` asks the CA, not an agent", cmd.CommandPath())
	}
	return nil
}

// exists counts what may not be looked at as there: opening it then says why.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
