package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/meshca/meshca/agent"
)

// run puts the agent together and runs it until ctx ends.
func run(ctx context.Context, c *Config, stderr io.Writer) error {
	level, err := c.logLevel()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: level}))
	config, err := c.agent(log)
	if err != nil {
		return err
	}
	a, err := agent.New(config)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
